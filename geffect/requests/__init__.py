"""Requests to forget, one after the other: what each does to what the others asked for."""

from .requests import Requests

__all__ = ["Requests"]
