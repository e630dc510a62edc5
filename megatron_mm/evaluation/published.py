"""Scores published by the papers' authors, to be printed next to results. Every score names the source in which it was found.

`Published.confirmed` is true if a score was read from the authors' own page or from two independent sources, and false if it was read from
a single source by others. The MM1 paper itself was not available.
"""

from __future__ import annotations

from dataclasses import dataclass

_MM1 = "MM1, arXiv 2403.09611, few-shot evaluation of the pre-trained models, not from the paper itself: "
_ARTICLE = "an article about it (notes on ECCV 2024)"
_MM1_3B = f"{_MM1}{_ARTICLE} and the model card of Salesforce's xGen-MM (its VQAv2 and VizWiz figures are for testdev)"
_MM1_3B_4 = f"{_MM1}the model card of Salesforce's xGen-MM (its VQAv2 and VizWiz figures are for testdev)"
_MM1_7B = f"{_MM1}{_ARTICLE}, and for TextVQA, VQAv2 and VizWiz a second collection"
_MM1_30B = f"{_MM1}{_ARTICLE}"
_MM1_SFT = (
    "MM1, arXiv 2403.09611, fine-tuned models, not from the paper itself: two collections of results that agree; those of 3B-MoE are also "
    "in NaViL's comparison tables"
)
_INFIMM_PT = "InfiMM's model card (Infi-MM/infimm-zephyr), table PreTraining Evaluation"
_INFIMM_IFT = "InfiMM's model card (Infi-MM/infimm-zephyr), table IFT Evaluation"
_MONO = "Mono-InternVL's README (OpenGVLab/Mono-InternVL), table Performance; all but SEED are also in NaViL's comparison tables"


@dataclass(frozen=True)
class Published:
    """A published figure."""

    model: str
    value: float
    source: str
    confirmed: bool = True
    """Read from the authors' own page, or from two independent sources."""

    def __str__(self) -> str:
        """The value as tables print it, with a question mark if it is not confirmed."""
        return f"{self.value:g}{'' if self.confirmed else '?'}"


UNCONFIRMED = "?: from one source that is not the authors' own, not confirmed: compare with the paper before you use it"
"""Explanation of the question mark."""

_MM1_TASKS = ("coco_caption", "nocaps", "textcaps", "vqav2", "textvqa", "vizwiz", "okvqa")
_SEVEN_B_TWICE = ("vqav2", "textvqa", "vizwiz")
_FEW_SHOT: dict[tuple[str, str, int], tuple[dict[str, float], str, tuple[str, ...]]] = {
    # recipe, model, shots: figures, source, tasks whose figures were found in two sources
    ("mm1_3b", "MM1-3B", 0): (dict(zip(_MM1_TASKS, (73.5, 55.6, 63.3, 46.2, 29.4, 15.6, 26.1), strict=True)), _MM1_3B, _MM1_TASKS),
    # Two versions of the model card differ in OK-VQA with 4 shots (48.6 and 44.6), so it is left out.
    ("mm1_3b", "MM1-3B", 4): (dict(zip(_MM1_TASKS[:-1], (112.3, 99.7, 84.1, 57.9, 45.3, 38.0), strict=True)), _MM1_3B_4, ()),
    ("mm1_3b", "MM1-3B", 8): (dict(zip(_MM1_TASKS, (114.6, 104.7, 88.8, 63.6, 44.6, 46.4, 48.4), strict=True)), _MM1_3B, _MM1_TASKS),
    ("mm1_7b", "MM1-7B", 8): (dict(zip(_MM1_TASKS, (116.3, 106.6, 88.2, 63.6, 46.3, 45.3, 51.4), strict=True)), _MM1_7B, _SEVEN_B_TWICE),
    ("mm1_30b", "MM1-30B", 8): (dict(zip(_MM1_TASKS, (123.1, 111.6, 92.9, 70.9, 49.4, 49.9, 58.3), strict=True)), _MM1_30B, ()),
}
_SFT_TASKS = ("vqav2", "textvqa", "scienceqa", "mmmu", "mmbench", "pope", "seed", "mme")
_SFT: dict[tuple[str, str], dict[str, float]] = {
    ("mm1_3b_sft", "MM1-3B-Chat"): dict(zip(_SFT_TASKS, (82.0, 71.9, 69.4, 33.9, 67.8, 87.4, 68.8, 1761.8), strict=True)),
    ("mm1_3b_moe_sft", "MM1-3B-MoE-Chat"): dict(zip(_SFT_TASKS, (82.5, 72.9, 76.1, 38.6, 70.8, 87.6, 69.4, 1772.5), strict=True)),
    ("mm1_7b_sft", "MM1-7B-Chat"): dict(zip(_SFT_TASKS, (82.8, 72.8, 72.6, 37.0, 72.3, 86.6, 69.9, 1858.2), strict=True)),
    ("mm1_7b_moe_sft", "MM1-7B-MoE-Chat"): dict(zip(_SFT_TASKS, (83.4, 73.8, 74.4, 40.9, 72.7, 87.8, 70.9, 1992.0), strict=True)),
    ("mm1_30b_sft", "MM1-30B-Chat"): dict(zip(_SFT_TASKS, (83.7, 73.5, 81.0, 44.7, 75.1, 87.6, 72.1, 2069.0), strict=True)),
}
"""SEED covers the questions about images only; MME is the sum of perception and cognition."""
_INFIMM_TASKS = ("coco_caption", "vqav2", "textvqa", "okvqa")
_INFIMM = {
    ("infimm_zephyr_7b_pt", "InfiMM-Zephyr-7B", 0): (78.8, 33.7, 15.2, 17.1),
    ("infimm_zephyr_7b_pt", "InfiMM-Zephyr-7B", 4): (108.6, 59.1, 34.3, 50.5),
    ("infimm_llama_13b_pt", "InfiMM-Llama2-13B", 0): (85.4, 51.6, 24.2, 26.4),
    ("infimm_llama_13b_pt", "InfiMM-Llama2-13B", 4): (125.2, 66.1, 38.2, 55.5),
    ("infimm_vicuna_13b_pt", "InfiMM-Vicuna-13B", 0): (69.6, 60.4, 32.8, 49.2),
    ("infimm_vicuna_13b_pt", "InfiMM-Vicuna-13B", 4): (118.1, 64.2, 38.4, 53.7),
}
_INFIMM_CHAT = {
    ("infimm_zephyr_7b_ift", "InfiMM-Zephyr-7B"): {"scienceqa": 71.1, "mme": 1733.0, "mmbench": 59.7, "mmmu": 39.4},
    ("infimm_llama_13b_ift", "InfiMM-Llama-13B"): {"scienceqa": 73.0, "mme": 1782.1, "mmbench": 66.4, "mmmu": 39.1},
    ("infimm_vicuna_13b_ift", "InfiMM-Vicuna-13B"): {"scienceqa": 74.0, "mme": 1784.7, "mmbench": 66.7, "mmmu": 37.6},
}
"""MME is the sum of perception and cognition, which the model card lists separately."""
_MONO_2B = {"mmmu": 33.7, "mme": 1875.0, "mmbench": 65.5, "seed": 67.4, "textvqa": 72.6, "scienceqa": 93.6, "gqa": 59.5}
"""MMBench was evaluated on its test split, whose answers are not public; the task `mmbench` evaluates the dev split."""


def _figures() -> dict[tuple[str, str, int], Published]:
    found: dict[tuple[str, str, int], Published] = {}
    for (recipe, model, shots), (scores, source, twice) in _FEW_SHOT.items():
        found |= {(recipe, task, shots): Published(model, value, source, task in twice) for task, value in scores.items()}
    for (recipe, model), scores in _SFT.items():
        found |= {(recipe, task, 0): Published(model, value, _MM1_SFT) for task, value in scores.items()}
    for (recipe, model, shots), values in _INFIMM.items():
        found |= {(recipe, task, shots): Published(model, v, _INFIMM_PT) for task, v in zip(_INFIMM_TASKS, values, strict=True)}
    for (recipe, model), scores in _INFIMM_CHAT.items():
        found |= {(recipe, task, 0): Published(model, value, _INFIMM_IFT) for task, value in scores.items()}
    found |= {("mono_internvl_2b_s2", task, 0): Published("Mono-InternVL-2B", value, _MONO) for task, value in _MONO_2B.items()}
    return found


FIGURES = _figures()
"""Published scores by recipe, task and number of demonstrations."""


def published(recipe: str, task: str, shots: int) -> Published | None:
    """Return the published score of the model that a recipe trains, or None if none was found."""
    return FIGURES.get((recipe, task, shots))
