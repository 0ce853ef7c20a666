"""From words to a mask: the adapters of the models that SubjectLocalize runs.

grounding_dino and segment_anything are torch modules around the packages of the same names; vocabulary and
boxes need neither; files and managed tie them to ComfyUI's folders and memory; pipeline runs them on a batch.
The packages are optional: each is imported when a model of its kind is built.
"""


class Problem(ValueError):
    """What is wrong and what to do about it, in one sentence, without the node's name."""
