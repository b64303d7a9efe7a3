"""Use a trained network: read pictures, serve a page, export it, describe it, and add digits to train on."""
