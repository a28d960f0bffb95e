"""Models of the Hugging Face hub, or of another server that speaks as it does (HF_ENDPOINT).

names.py      hub ids: org/name, org/name@revision, org/name:file.gguf
listing.py    what a model holds at one commit, as the hub says, or the cache where that is all
wanted.py     which of its files hmc needs
ranges.py     bytes of a file by range requests
headers.py    a folder that looks like the model and holds headers alone, for the compiler
cache.py      the hub's cache on this machine, as all of its clients lay it out
transfer.py   one file into that cache, from where an earlier transfer ended, checked by its hash
fetch.py      all files of a model, some at a time
planning.py   from a hub id to a plan

names.py loads nothing; all else needs the package huggingface_hub (hmc[hub]).
"""
