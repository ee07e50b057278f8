"""Sources of texts alone: sentences (stage 1), and the triples of NLI."""

import hashlib
from collections.abc import Sequence

from unime_jax.data import nli, text_keys
from unime_jax.data.sources import Example
from unime_jax.data.teacher_vectors import sentences_hash


class Texts:
    """Sentences alone (stage 1): the row has a query and no target."""

    def __init__(self, sentences: Sequence[str], name: str = "sentences"):
        self.name = name
        self._sentences = sentences

    def __len__(self) -> int:
        return len(self._sentences)

    @property
    def fingerprint(self) -> str:
        """Is equal for equal rows: their lengths are measured once (`strata.measure`)."""
        return f"sentences {sentences_hash(self._sentences)}"

    def __getitem__(self, index: int) -> Example:
        text = self._sentences[index]
        return Example(query_text=text, target_id=text_keys.compact_key(text), set=self.name)


class Triples:
    """Rows of NLI: a query, its target and a hard negative; texts alone."""

    def __init__(self, found: nli.Nli, name: str = "nli"):
        self.name = name
        self._nli = found

    def __len__(self) -> int:
        return len(self._nli.rows)

    @property
    def fingerprint(self) -> str:
        """See `Texts.fingerprint`."""
        rows = hashlib.sha256(self._nli.rows.tobytes()).hexdigest()
        return f"triples {rows} of {sentences_hash(self._nli.sentences)}"

    def __getitem__(self, index: int) -> Example:
        query, target, negative = (self._nli.sentences[int(i)] for i in self._nli.rows[index])
        return Example(
            query_text=query,
            target_text=target,
            negative_text=negative,
            target_id=target.casefold(),
            negative_id=negative.casefold(),
            set=self.name,
        )
