"""What recording costs, as ratios taken in one process: `python -m tests.bench`.

Times of two loads are compared in interleaved rounds, memory by counting what is alive. One file a
kind of quantity; `rounds`, `memory` and `bars` say how they are taken and judged.
"""
