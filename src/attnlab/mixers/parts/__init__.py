"""Parts that mixers of several families share; none is registered."""
