"""Study of what helps a small student (`python -m qcrd_fast.bench.study`)."""
