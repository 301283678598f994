"""What helps a small student: arms on synthetic reasoning tasks, paired by seed (`python -m qcrd_fast.bench.study`)."""
