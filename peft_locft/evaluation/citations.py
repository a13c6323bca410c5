"""What to cite: BibTeX of the data sets, methods and protocols that a report names."""

from __future__ import annotations

import re
from collections.abc import Iterable

# arXiv's number, the authors, the year, the title
PAPERS = {
    "yang2025finetuning": (
        "2509.22072",
        "Yang, Wanli and Sun, Fei and Tang, Rui and Zang, Hongyu and Su, Du and Cao, Qi and Wang, Jingang and "
        "Shen, Huawei and Cheng, Xueqi",
        2025,
        "Fine-tuning Done Right in Model Editing",
    ),
    "yang2025mirage": (
        "2502.11177",
        "Yang, Wanli and Sun, Fei and Tan, Jiajun and Ma, Xinyu and Cao, Qi and Yin, Dawei and Shen, Huawei and "
        "Cheng, Xueqi",
        2025,
        "The Mirage of Model Editing: Revisiting Evaluation in the Wild",
    ),
    "wang2023easyedit": (
        "2308.07269",
        "Wang, Peng and others",
        2023,
        "{EasyEdit}: An Easy-to-use Knowledge Editing Framework for Large Language Models",
    ),
    "meng2022locating": (
        "2202.05262",
        "Meng, Kevin and Bau, David and Andonian, Alex and Belinkov, Yonatan",
        2022,
        "Locating and Editing Factual Associations in {GPT}",
    ),
    "meng2023massediting": (
        "2210.07229",
        "Meng, Kevin and Sharma, Arnab Sen and Andonian, Alex and Belinkov, Yonatan and Bau, David",
        2023,
        "Mass-Editing Memory in a Transformer",
    ),
    "fang2025alphaedit": (
        "2410.02355",
        "Fang, Junfeng and Jiang, Houcheng and Wang, Kun and Ma, Yunshan and Shi, Jie and Wang, Xiang and "
        "He, Xiangnan and Chua, Tat-Seng",
        2025,
        "{AlphaEdit}: Null-Space Constrained Knowledge Editing for Language Models",
    ),
    "gu2025ultraedit": (
        "2505.14679",
        "Gu, Xiaojie and Huang, Ziying and Gu, Jia-Chen and Zhang, Kai",
        2025,
        "{UltraEdit}: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models",
    ),
    "hu2022lora": (
        "2106.09685",
        "Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean and "
        "Wang, Lu and Chen, Weizhu",
        2022,
        "{LoRA}: Low-Rank Adaptation of Large Language Models",
    ),
    "zhu2020modifying": (
        "2012.00363",
        "Zhu, Chen and Rawat, Ankit Singh and Zaheer, Manzil and Bhojanapalli, Srinadh and Li, Daliang and "
        "Yu, Felix and Kumar, Sanjiv",
        2020,
        "Modifying Memories in Transformer Models",
    ),
    "zheng2023ike": (
        "2305.12740",
        "Zheng, Ce and Li, Lei and Dong, Qingxiu and Fan, Yuxuan and Wu, Zhiyong and Xu, Jingjing and Chang, Baobao",
        2023,
        "Can We Edit Factual Knowledge by In-Context Learning?",
    ),
    "levy2017zeroshot": (
        "1706.04115",
        "Levy, Omer and Seo, Minjoon and Choi, Eunsol and Zettlemoyer, Luke",
        2017,
        "Zero-Shot Relation Extraction via Reading Comprehension",
    ),
    "mitchell2022fast": (
        "2110.11309",
        "Mitchell, Eric and Lin, Charles and Bosselut, Antoine and Finn, Chelsea and Manning, Christopher D.",
        2022,
        "Fast Model Editing at Scale",
    ),
    "zhong2023mquake": (
        "2305.14795",
        "Zhong, Zexuan and Wu, Zhengxuan and Manning, Christopher D. and Potts, Christopher and Chen, Danqi",
        2023,
        "{MQuAKE}: Assessing Knowledge Editing in Language Models via Multi-Hop Questions",
    ),
    "huang2024hallueditbench": (
        "2410.16251",
        "Huang, Baixiang and Chen, Canyu and Xu, Xiongxiao and Payani, Ali and Shu, Kai",
        2024,
        "Can Knowledge Editing Really Correct Hallucinations?",
    ),
    "deng2024unke": (
        "2405.15349",
        "Deng, Jingcheng and Wei, Zihao and Pang, Liang and Ding, Hanxing and Shen, Huawei and Cheng, Xueqi",
        2024,
        "Everything is Editable: Extend Knowledge Editing to Unstructured Data in Large Language Models",
    ),
    "wu2024akew": (
        "2402.18909",
        "Wu, Xiaobao and Pan, Liangming and Wang, William Yang and Luu, Anh Tuan",
        2024,
        "{AKEW}: Assessing Knowledge Editing in the Wild",
    ),
    "wang2023retrieval": (
        "2312.13040",
        "Wang, Weixuan and Haddow, Barry and Birch, Alexandra",
        2023,
        "Retrieval-augmented Multilingual Knowledge Editing",
    ),
    "nie2024bmike": (
        "2406.17764",
        "Nie, Ercong and others",
        2024,
        "{BMIKE-53}: Investigating Cross-Lingual Knowledge Editing with In-Context Learning",
    ),
    "zhang2024comprehensive": (
        "2401.01286",
        "Zhang, Ningyu and others",
        2024,
        "A Comprehensive Study of Knowledge Editing for Large Language Models",
    ),
    "thede2025wikibigedit": (
        "2503.05683",
        "Thede, Lukas and Roth, Karsten and Bethge, Matthias and Akata, Zeynep and Hartvigsen, Tom",
        2025,
        "{WikiBigEdit}: Understanding the Limits of Lifelong Knowledge Editing in {LLMs}",
    ),
    "cohen2023ripple": (
        "2307.12976",
        "Cohen, Roi and Biran, Eden and Yoran, Ori and Globerson, Amir and Geva, Mor",
        2023,
        "Evaluating the Ripple Effects of Knowledge Editing in Language Models",
    ),
    "chen2025uniedit": (
        "2505.12345",
        "Chen, Qizhou and others",
        2025,
        "{UniEdit}: A Unified Knowledge Editing Benchmark for Large Language Models",
    ),
}
# a part of a file's name, to the papers of its data; the first that fits counts
DATA_SETS = {
    "mzsre": ("wang2023retrieval", "levy2017zeroshot"),
    "zsre": ("levy2017zeroshot", "mitchell2022fast"),
    "bmike": ("nie2024bmike",),
    "counterfact": ("meng2022locating",),
    "mquake": ("zhong2023mquake",),
    "qaedit": ("yang2025mirage",),
    "halluedit": ("huang2024hallueditbench",),
    "unke": ("deng2024unke",),
    "akew": ("wu2024akew",),
    "knowedit": ("zhang2024comprehensive",),
    "wikibigedit": ("thede2025wikibigedit",),
    "ripple": ("cohen2023ripple",),
    "uniedit": ("chen2025uniedit",),
}
# a method's name, such as PEFT's or that of a baseline
METHODS = {
    "locft": "yang2025finetuning",
    "lora": "hu2022lora",
    "memit": "meng2023massediting",
    "rome": "meng2022locating",
    "alphaedit": "fang2025alphaedit",
    "ultraedit": "gu2025ultraedit",
    "mend": "mitchell2022fast",
}
# a method of `workflows.compare_baselines`
BASELINES = {
    "FT-L": ("zhu2020modifying", METHODS["locft"]),
    "FT-M": ("zhang2024comprehensive", METHODS["locft"]),
    "LocFT": (METHODS["locft"],),
    "LocFT-published": (METHODS["locft"],),
    "LocFT-balanced": (METHODS["locft"],),
    "LoRA": (METHODS["lora"],),
    "MEMIT": (METHODS["memit"],),
    "AlphaEdit": (METHODS["alphaedit"],),
    "UltraEdit": (METHODS["ultraedit"],),
    "retrieval": ("zheng2023ike",),
    "retrieval-gated": ("zheng2023ike",),
}
PROTOCOLS = {
    "generation": "yang2025finetuning",
    "token_accuracy": "wang2023easyedit",
    "probability": "meng2022locating",
    "fluency": "meng2022locating",
}


def papers_of_data(sources: Iterable[str]) -> list[str]:
    """Return the keys in `PAPERS` of the data sets that file names, such as `"zsre_3k.json:12"`, tell of."""
    found: dict[str, None] = {}
    for file in dict.fromkeys(source.rpartition(":")[0] or source for source in sources):
        name = re.sub(r"[^a-z]", "", file.lower())
        found |= dict.fromkeys(next((keys for part, keys in DATA_SETS.items() if part in name), ()))
    return list(found)


def papers_of_baselines(methods: Iterable[str]) -> list[str]:
    """Return the keys in `PAPERS` of the methods of a comparison, such as "MEMIT"."""
    return list(dict.fromkeys(key for method in methods for key in BASELINES.get(method, ())))


def bibtex(keys: Iterable[str]) -> str:
    """Return the entries of some papers, each once.

    Args:
        keys: of `PAPERS`.

    Example:
        >>> print(bibtex(["meng2022locating"]))
    """
    return "\n\n".join(_entry(key) for key in dict.fromkeys(keys))


def _entry(key: str) -> str:
    number, authors, year, title = PAPERS[key]
    fields = {
        "title": title,
        "author": authors,
        "year": str(year),
        "eprint": number,
        "archivePrefix": "arXiv",
    }
    lines = [f"  {name:13} = {{{value}}}" for name, value in fields.items()]
    return f"@misc{{{key},\n" + ",\n".join(lines) + "\n}"
