"""Generative models of scenes of objects, trained by variational inference in Pyro."""

__version__ = "0.1.0"
