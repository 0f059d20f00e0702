"""What HDF5 writes in memory, interrupted while HDF5 is at work."""

from tests.utils.subprocesses import in_another_process


def test_an_interrupt_inside_of_hdf5_is_raised_afterwards_and_crashes_nothing() -> None:
    # What HDF5 still had open at the end of Python would end the process by a signal.
    code = """
        import sys
        from geffect.store import contiguous

        def interrupted(name, number):
            def at_line(frame, event, argument):
                come[0] += event == "line"
                if come[0] == number:
                    raise KeyboardInterrupt
                return at_line

            def at_call(frame, *_):
                ours = frame.f_code.co_filename == contiguous.__file__
                return at_line if ours and frame.f_code.co_name == name else None

            come, image = [0], contiguous.Image()
            sys.settrace(at_call)
            with contiguous.written(image) as file:
                contiguous.declare(file, "x", (3,), "<f8")
            sys.settrace(None)
            return image.size

        for name, number in (("seek", 1), ("seek", 3), ("write", 2), ("truncate", 1)):
            try:
                interrupted(name, number)
            except KeyboardInterrupt:
                print(name, end=" ")
    """
    assert in_another_process(code) == "seek seek write truncate"
