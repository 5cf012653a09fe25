"""The two ROUGE-L variants that the benchmarks use, without their packages.

`rouge_lsum` is that of Google's rouge_score 0.1.2 without stemming (InfiniteBench, En.Sum); `rouge_l` is that of the
package `rouge` 1.0.1 (LV-Eval, dureader), which counts distinct words. Both were compared with the packages on random
texts; see tests/eval/tasks/test_rouge.py for fixed values.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence


def _lcs_table(first: Sequence[str], second: Sequence[str]) -> list[list[int]]:
    """[len(first) + 1][len(second) + 1] lengths of the longest common subsequence of every two beginnings."""
    table = [[0] * (len(second) + 1)]
    for word in first:
        above, row = table[-1], [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    return table


def rouge_lsum(prediction: str, references: Sequence[str]) -> float:
    """F-measure of the summary-level longest common subsequence, lines being sentences; the best of the references."""
    return max(_lsum(prediction, reference) for reference in references)


def _lsum(prediction: str, reference: str) -> float:
    wanted = [_ascii_words(line) for line in reference.split("\n") if line]
    given = [_ascii_words(line) for line in prediction.split("\n") if line]
    num_wanted, num_given = sum(map(len, wanted)), sum(map(len, given))
    if not num_wanted or not num_given:
        return 0.0
    left_wanted = Counter(word for line in wanted for word in line)
    left_given = Counter(word for line in given for word in line)
    hits = 0
    for line in wanted:
        covered: set[int] = set()
        for other in given:
            covered |= _lcs_indices(line, other)
        for word in (line[i] for i in sorted(covered)):
            if left_given[word] > 0 and left_wanted[word] > 0:  # no word is counted more often than it occurs
                hits += 1
                left_given[word] -= 1
                left_wanted[word] -= 1
    recall, precision = hits / num_wanted, hits / num_given
    return 2 * precision * recall / (precision + recall) if hits else 0.0


def _ascii_words(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).split()


def _lcs_indices(first: Sequence[str], second: Sequence[str]) -> set[int]:
    """Indices into `first` of one longest common subsequence; which one decides scores, so ties go as there."""
    table = _lcs_table(first, second)
    i, j = len(first), len(second)
    indices = set()
    while i > 0 and j > 0:
        if first[i - 1] == second[j - 1]:
            indices.add(i - 1)
            i, j = i - 1, j - 1
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return indices


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure over distinct words; full stops end sentences, words are separated by white space.

    0 for an empty side, where the package raises and LV-Eval catches. The package also fails, and LV-Eval then counts
    0, where reference and answer have together about a thousand words (its recursion); here they get their score.
    """
    given, wanted = _sentences(prediction), _sentences(reference)
    if not given or not wanted:
        return 0.0
    common: set[str] = set()
    for line in wanted:
        for other in given:
            common |= _lcs_words(line, other)
    precision = len(common) / len({word for line in given for word in line})
    recall = len(common) / len({word for line in wanted for word in line})
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _lcs_words(first: Sequence[str], second: Sequence[str]) -> set[str]:
    """Words of one longest common subsequence; ties go the other way than in `_lcs_indices`, as in the package."""
    table = _lcs_table(first, second)
    i, j = len(first), len(second)
    words = set()
    while i > 0 and j > 0:
        if first[i - 1] == second[j - 1]:
            words.add(first[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words
