"""How models are trained: standard and adversarial training, the Divided We Fall mixture."""
