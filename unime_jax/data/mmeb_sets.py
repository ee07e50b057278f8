"""The 20 training sets of MMEB, as published (Hugging Face: TIGER-Lab/MMEB-train), and a row."""

import dataclasses

SPLITS = ("original", "diverse_instruction")
COLUMNS = (
    "qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path",
)  # fmt: skip
ROWS_PER_SET = 50_000  # of each set the recipe takes the first so many rows


@dataclasses.dataclass(frozen=True)
class TrainSet:
    """One of the sets.

    Attributes:
      name: of its directory.
      task: classification, vqa, retrieval or grounding.
      rows: of its split `original`, to three digits.
      sides: where its images stand: "query", "target" or "both".
    """

    name: str
    task: str
    rows: int
    sides: str

    @property
    def used(self) -> int:
        """Rows that the recipe takes."""
        return min(self.rows, ROWS_PER_SET)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One row; images are places among the set's images, -1 where a side has none.

    Attributes:
      target_key: equal for equal targets, text and image content alike.
      row: its number in the published files.
    """

    query_text: str
    query_image: int
    target_text: str
    target_image: int
    target_key: str
    row: int


SETS = (
    TrainSet("ImageNet_1K", "classification", 100_000, "query"),
    TrainSet("N24News", "classification", 49_000, "query"),
    TrainSet("HatefulMemes", "classification", 8_500, "query"),
    TrainSet("VOC2007", "classification", 7_850, "query"),
    TrainSet("SUN397", "classification", 19_900, "query"),
    TrainSet("OK-VQA", "vqa", 9_000, "query"),
    TrainSet("A-OKVQA", "vqa", 17_100, "query"),
    TrainSet("DocVQA", "vqa", 39_500, "query"),
    TrainSet("InfographicsVQA", "vqa", 24_000, "query"),
    TrainSet("ChartQA", "vqa", 28_300, "query"),
    TrainSet("Visual7W", "vqa", 70_000, "query"),
    TrainSet("VisDial", "retrieval", 123_500, "query"),
    TrainSet("CIRR", "retrieval", 26_100, "both"),
    TrainSet("VisualNews_t2i", "retrieval", 100_000, "target"),
    TrainSet("VisualNews_i2t", "retrieval", 100_000, "query"),
    TrainSet("MSCOCO_t2i", "retrieval", 100_000, "target"),
    TrainSet("MSCOCO_i2t", "retrieval", 113_500, "query"),
    TrainSet("NIGHTS", "retrieval", 16_000, "both"),
    TrainSet("WebQA", "retrieval", 17_200, "target"),
    TrainSet("MSCOCO", "grounding", 100_000, "both"),
)
NAMES = tuple(found.name for found in SETS)
