"""Codes of languages, as data sets name them."""

import functools

# ISO 639: the codes of two letters, and those of three that multilingual data sets use beside them
CODES = """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el
    en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja
    jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd
    ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss
    st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
    ara ben ceb ces dan deu ell eng fas fil fin fra heb hin hun ind ita jpn kor nld pol por ron rus spa swe tam tha
    tur ukr urd vie yue zho
"""
KNOWN = frozenset(CODES.split())
NAMES = {
    **{"arabic": "ar", "chinese": "zh", "english": "en", "french": "fr", "german": "de", "hebrew": "he"},
    **{"hindi": "hi", "italian": "it", "japanese": "ja", "korean": "ko", "portuguese": "pt", "russian": "ru"},
    **{"spanish": "es", "thai": "th", "turkish": "tr", "vietnamese": "vi"},
}


@functools.lru_cache(maxsize=10_000)
def language_code(name: object) -> str | None:
    """Return the code of a language, such as `"zh-cn"`, by a code or an English name; `None` if it is none."""
    plain = str(name).strip().casefold().replace("_", "-")
    return NAMES.get(plain) or (plain if plain.split("-")[0] in KNOWN else None)
