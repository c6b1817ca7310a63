"""Serve a frozen language model and steer it while it decodes."""
