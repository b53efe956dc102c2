"""Token mixers, a folder a family, a file a mechanism; `attnlab.list_mixers()` names them."""
