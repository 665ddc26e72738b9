"""Reference implementations: plain torch, any device, differentiable. They are the oracle and the explanation."""
