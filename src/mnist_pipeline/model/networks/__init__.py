"""The networks to choose from: `model.network` in the params names one of these files, and the file has its class."""
