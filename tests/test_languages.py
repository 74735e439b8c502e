"""The mix of languages, on sentences whose language is known."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from hybridtune.data.doubts.languages import languages

SENTENCES = {
    "en": [
        "The train to the coast leaves at half past nine.",
        "Could you tell me why my order has not arrived yet?",
        "She planted two apple trees behind the old barn.",
        "We are looking for someone who can repair the roof.",
    ],
    "de": [
        "Der Zug an die Küste fährt um halb zehn ab.",
        "Können Sie mir sagen, warum meine Bestellung noch nicht da ist?",
        "Sie hat hinter der alten Scheune zwei Apfelbäume gepflanzt.",
        "Wir suchen jemanden, der das Dach reparieren kann.",
    ],
    "fr": [
        "Le train pour la côte part à neuf heures et demie.",
        "Pouvez-vous me dire pourquoi ma commande n'est pas encore arrivée ?",
        "Elle a planté deux pommiers derrière la vieille grange.",
        "Nous cherchons quelqu'un qui sache réparer le toit.",
    ],
    "zh": [
        "去海边的火车九点半开。",
        "您能告诉我为什么我的订单还没有到吗？",
        "她在旧谷仓后面种了两棵苹果树。",
        "我们在找会修屋顶的人。",
    ],
    "ja": [
        "海岸行きの列車は九時半に出発します。",
        "注文した品物がまだ届かない理由を教えていただけますか。",
        "彼女は古い納屋の裏にりんごの木を二本植えました。",
        "屋根を修理できる人を探しています。",
    ],
    "ar": [
        "يغادر القطار إلى الساحل في الساعة التاسعة والنصف.",
        "هل يمكنك أن تخبرني لماذا لم يصل طلبي حتى الآن؟",
        "زرعت شجرتي تفاح خلف الحظيرة القديمة.",
        "نحن نبحث عن شخص يستطيع إصلاح السقف.",
    ],
}


@pytest.mark.parametrize("name", SENTENCES)
def test_sentences_of_one_language(name: str) -> None:
    for sentence in SENTENCES[name]:
        assert languages([sentence]) == {name: 1.0}


def test_a_mix() -> None:
    texts = SENTENCES["en"] * 3 + SENTENCES["zh"] * 2 + SENTENCES["ar"] + ["42", "", "???", "ok"]
    found = languages(texts)
    assert found == {"en": 12 / 28, "zh": 8 / 28, "ar": 4 / 28, "unsure": 4 / 28}
    assert list(found) == ["en", "zh", "ar", "unsure"]


def test_a_few_rows_may_be_mistakes() -> None:
    texts = SENTENCES["en"] * 50 + SENTENCES["fr"][:1]
    assert languages(texts) == {"en": 200 / 201, "unsure": 1 / 201}


def test_nothing_and_no_language() -> None:
    assert languages([]) == {}
    assert languages(["", "   ", "12345", "😀😀", "\ud83d"]) == {"unsure": 1.0}


def test_the_sample_is_seeded_and_small() -> None:
    texts = (SENTENCES["en"] + SENTENCES["de"]) * 100
    first, again, other = (languages(texts, most=40, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert all(round(share * 40, 6).is_integer() for share in first.values())
    assert languages(texts) == {"en": 0.5, "de": 0.5}


@pytest.mark.parametrize(("folder", "name"), [("xlmt_sentiment/fr", "fr"), ("thucnews_titles_zh", "zh")])
def test_real_data(shared_data: Path, folder: str, name: str) -> None:
    texts = [json.loads(line)["text"] for line in (shared_data / folder / "train.jsonl").open(encoding="utf-8")]
    started = time.perf_counter()
    found = languages(texts)
    assert time.perf_counter() - started < 20
    assert found[name] > 0.95
    assert not set(found) - {name, "unsure"}
