"""What a build left, as a page, a model card and data. Pure: ``facts`` makes values of ``build.json``, ``pages`` text.

Where targets were evaluated, ``build.json`` holds ``evaluation``: ``{"source", "length", "dtype", "targets": {name:
result}}``, a result being ``{"perplexity", "perplexity_llama", "source_perplexity", "source_perplexity_llama", "kl",
"top1", "tokens", "weights"}``; else it is null.
"""
