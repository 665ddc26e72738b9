"""Thin adapters that put fastrl's ops into other libraries."""
