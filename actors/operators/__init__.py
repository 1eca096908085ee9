"""Operator adapters."""
