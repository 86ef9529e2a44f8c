"""Labels as Transformers writes them: ``labels[t]`` is token t itself, or -100 where it carries no loss.

They are not shifted: position t predicts token t + 1, so its target is ``labels[t + 1]``.
"""

IGNORED = -100
