"""What a build left, as a page, a model card and data. Pure: ``facts`` makes values of ``build.json``, ``pages`` text.

``build.json`` may hold, beside what every build writes,
``evaluation``: ``{"text": {…}, "source": {result}, "targets": {name: {result}}}``, a result being
``{"perplexity", "perplexity_llama", "kl", "top1", "tokens"}``, and ``calibration``: ``{"digest", …}``.
"""
