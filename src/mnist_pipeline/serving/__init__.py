"""A trained network at work: it reads pictures and serves a page, is exported and described, and gets new digits."""
