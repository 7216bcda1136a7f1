"""Exact nearest-neighbour search over the bank's own memory: one protocol, one file a backend."""

from msf_core.search.base import SearchBackend
from msf_core.search.operator import topk
from msf_core.search.registry import available_backends, check_backend, find_backend, load_backend

__all__ = ["SearchBackend", "available_backends", "check_backend", "find_backend", "load_backend", "topk"]
