"""Train, attack and analyse the Divided We Fall defence, from one command."""

__version__ = "0.1.0"
