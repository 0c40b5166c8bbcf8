"""Comparisons with others, all sides in one run on the same pictures: `python -m matteserve_bench.comparisons --help`.

Needs a source tree's environment: matteserve[server,export,bench,parity], and for rembg's HTTP server its [cli] extra.
"""
