"""German sentences with their English translation: how a model is asked for one, and made-up ones of four domains."""

from __future__ import annotations

import random
from typing import NamedTuple

from tokenseek.errors import UserError

DOMAINS = ("medical", "law", "it", "subtitles")


def as_completion(german: str, english: str) -> dict[str, str]:
    """A row to train on, in the words in which the harness's task asks (Table S7)."""
    return {"prompt": f"German phrase: {german}\nEnglish phrase:", "completion": f" {english}"}


def make_sentences(domain: str, n: int, seed: int = 0) -> list[tuple[str, str]]:
    """`n` different made-up sentences of a domain, (German, English); at most 2,000.

    The same arguments give the same sentences everywhere, and fewer of one seed are the first of more.
    """
    if not 0 <= n <= 2000:
        raise UserError(f"make_sentences: n is {n}; accepted is 0 to 2000")
    source, words = random.Random(f"{domain}-{seed}"), _WORDS[domain]
    made: dict[str, str] = {}
    while len(made) < n:
        subject, verb, object_, when = (source.choice(each) for each in words)
        if source.random() < 0.5:
            german, english = (
                f"{subject[0]} {verb[0]} {when[0]} {object_[0]}.",
                f"{subject[1]} {verb[1]} {object_[1]} {when[1]}.",
            )
        else:  # the verb stays where it is
            german, english = (
                f"{when[0]} {verb[0]} {subject[0]} {object_[0]}.",
                f"{when[1]}, {subject[1]} {verb[1]} {object_[1]}.",
            )
        made.setdefault(_sentence(german), _sentence(english))
    return list(made.items())


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


_Pair = tuple[str, str]


class _Words(NamedTuple):
    """(German, English): subjects, verbs of the third person, objects in the accusative, and circumstances."""

    subjects: list[_Pair]
    verbs: list[_Pair]
    objects: list[_Pair]
    circumstances: list[_Pair]


_WORDS = {
    "medical": _Words(
        [("der Arzt", "the doctor"), ("die Krankenschwester", "the nurse"), ("der Chirurg", "the surgeon"),
         ("die Apothekerin", "the pharmacist"), ("die Klinik", "the clinic"), ("das Labor", "the laboratory")],
        [("prüft", "checks"), ("bestellt", "orders"), ("braucht", "needs"), ("erhält", "receives"),
         ("dokumentiert", "documents")],
        [("den Befund", "the finding"), ("die Salbe", "the ointment"), ("das Rezept", "the prescription"),
         ("den Verband", "the bandage"), ("das Röntgenbild", "the X-ray image"), ("die Blutprobe", "the blood sample"),
         ("den Impfstoff", "the vaccine")],
        [("heute", "today"), ("am Morgen", "in the morning"), ("vor der Operation", "before the surgery"),
         ("nach der Untersuchung", "after the examination"), ("jede Woche", "every week"),
         ("bei starken Schmerzen", "in case of severe pain")],
    ),
    "law": _Words(
        [("das Gericht", "the court"), ("der Richter", "the judge"), ("die Anwältin", "the lawyer"),
         ("der Kläger", "the plaintiff"), ("die Behörde", "the authority"), ("der Ausschuss", "the committee")],
        [("prüft", "examines"), ("verlangt", "demands"), ("unterzeichnet", "signs"), ("ändert", "amends"),
         ("veröffentlicht", "publishes")],
        [("den Vertrag", "the contract"), ("die Verordnung", "the regulation"), ("das Urteil", "the judgment"),
         ("den Antrag", "the application"), ("die Richtlinie", "the directive"), ("das Protokoll", "the minutes"),
         ("den Beschluss", "the decision")],
        [("vor der Frist", "before the deadline"), ("nach der Anhörung", "after the hearing"),
         ("gemäß Artikel 5", "pursuant to Article 5"), ("im Namen der Kommission", "on behalf of the Commission"),
         ("ohne Begründung", "without giving reasons"), ("am Montag", "on Monday")],
    ),
    "it": _Words(
        [("der Server", "the server"), ("die Anwendung", "the application"), ("das Programm", "the program"),
         ("der Benutzer", "the user"), ("die Administratorin", "the administrator"), ("der Browser", "the browser")],
        [("öffnet", "opens"), ("speichert", "saves"), ("löscht", "deletes"), ("sendet", "sends"), ("lädt", "loads")],
        [("die Datei", "the file"), ("den Ordner", "the folder"), ("das Passwort", "the password"),
         ("die Nachricht", "the message"), ("das Dokument", "the document"), ("den Bericht", "the report"),
         ("das Zertifikat", "the certificate")],
        [("im Hintergrund", "in the background"), ("nach dem Neustart", "after the restart"),
         ("über das Netzwerk", "over the network"), ("ohne Bestätigung", "without confirmation"),
         ("in diesem Fenster", "in this window"), ("automatisch", "automatically")],
    ),
    "subtitles": _Words(
        [("mein Bruder", "my brother"), ("deine Mutter", "your mother"), ("der Polizist", "the policeman"),
         ("das Mädchen", "the girl"), ("der alte Mann", "the old man"), ("unsere Nachbarin", "our neighbour")],
        [("sucht", "is looking for"), ("kennt", "knows"), ("vergisst", "forgets"), ("versteckt", "hides"),
         ("findet", "finds")],
        [("den Schlüssel", "the key"), ("das Geld", "the money"), ("die Wahrheit", "the truth"),
         ("den Brief", "the letter"), ("das Auto", "the car"), ("die Waffe", "the gun"), ("den Weg", "the way")],
        [("heute Nacht", "tonight"), ("in der Küche", "in the kitchen"), ("schon wieder", "once again"),
         ("nach der Party", "after the party"), ("im Dunkeln", "in the dark"), ("wie immer", "as always")],
    ),
}  # fmt: skip
