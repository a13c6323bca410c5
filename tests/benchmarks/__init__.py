"""Measurements that the documentation quotes: run them by hand, on a quiet machine; pytest collects none of them."""
