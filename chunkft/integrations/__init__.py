"""Bridges to other training libraries; each module imports its library, so import only the one that is
used.
"""
