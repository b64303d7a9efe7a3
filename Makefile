export PATH := $(CURDIR)/.venv/bin:$(PATH)
