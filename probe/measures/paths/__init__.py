"""Paths: what each length does, without a plain pass where one was made."""
