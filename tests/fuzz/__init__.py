"""Fuzz targets: each is a `run(data)` that raises only for a bug; its corpus is replayed by test_corpus.py.

python -P -m tests.fuzz.vring                       # mutate the corpus for a minute
python -P -m tests.fuzz.vring -max_total_time=600   # with atheris installed: its options, coverage-guided
"""
