"""BibTeX entries of the methods that a comparison has."""

from __future__ import annotations

from collections.abc import Iterable

# authors, title, year and arXiv number of the paper that a method is from
PAPERS = {
    "yang2025finetuning": (
        "Yang, Wanli and Sun, Fei and Tang, Rui and Zang, Hongyu and Su, Du and Cao, Qi and Wang, Jingang and "
        "Shen, Huawei and Cheng, Xueqi",
        "Fine-tuning Done Right in Model Editing",
        2025,
        "2509.22072",
    ),
    "zhu2020modifying": (
        "Zhu, Chen and Rawat, Ankit Singh and Zaheer, Manzil and Bhojanapalli, Srinadh and Li, Daliang and "
        "Yu, Felix and Kumar, Sanjiv",
        "Modifying Memories in Transformer Models",
        2020,
        "2012.00363",
    ),
    "zhang2024comprehensive": (
        "Zhang, Ningyu and others",
        "A Comprehensive Study of Knowledge Editing for Large Language Models",
        2024,
        "2401.01286",
    ),
    "hu2021lora": (
        "Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean and "
        "Wang, Lu and Chen, Weizhu",
        "{LoRA}: Low-Rank Adaptation of Large Language Models",
        2021,
        "2106.09685",
    ),
    "meng2022memit": (
        "Meng, Kevin and Sharma, Arnab Sen and Andonian, Alex and Belinkov, Yonatan and Bau, David",
        "Mass-Editing Memory in a Transformer",
        2022,
        "2210.07229",
    ),
    "fang2024alphaedit": (
        "Fang, Junfeng and others",
        "{AlphaEdit}: Null-Space Constrained Knowledge Editing for Language Models",
        2024,
        "2410.02355",
    ),
    "gu2025ultraedit": (
        "Gu, Xiaojie and others",
        "{UltraEdit}: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models",
        2025,
        "2505.14679",
    ),
    "zheng2023ike": (
        "Zheng, Ce and Li, Lei and Dong, Qingxiu and Fan, Yuxuan and Wu, Zhiyong and Xu, Jingjing and Chang, Baobao",
        "Can We Edit Factual Knowledge by In-Context Learning?",
        2023,
        "2305.12740",
    ),
}
PAPERS_OF = {
    "FT-L": ("zhu2020modifying", "yang2025finetuning"),
    "FT-M": ("zhang2024comprehensive", "yang2025finetuning"),
    "LocFT": ("yang2025finetuning",),
    "LocFT-published": ("yang2025finetuning",),
    "LocFT-balanced": ("yang2025finetuning",),
    "LoRA": ("hu2021lora",),
    "MEMIT": ("meng2022memit",),
    "AlphaEdit": ("fang2024alphaedit",),
    "UltraEdit": ("gu2025ultraedit",),
    "retrieval": ("zheng2023ike",),
    "retrieval-gated": ("zheng2023ike",),
}


def bibtex(methods: Iterable[str]) -> str:
    """Return the BibTeX entries of some methods, each once.

    Args:
        methods: names such as "MEMIT".
    """
    keys = dict.fromkeys(key for method in methods for key in PAPERS_OF.get(method, ()))
    return "\n".join(_entry(key, *PAPERS[key]) for key in keys)


def _entry(key: str, authors: str, title: str, year: int, number: str) -> str:
    fields = {
        "author": authors,
        "title": title,
        "year": str(year),
        "eprint": number,
        "archivePrefix": "arXiv",
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@misc{{{key},", *lines, "}", ""])
