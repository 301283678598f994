"""Benchmarks: `qcrd-fast bench loss`, and the demo over seeds (`python -m qcrd_fast.bench.demo`)."""
