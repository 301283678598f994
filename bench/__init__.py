"""Benchmarks: `qcrd-fast bench loss`, and the demo over methods and seeds (`python bench/demo.py`)."""
