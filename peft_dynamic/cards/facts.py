"""What a card can say beyond how to load the adapter. Whoever knows it fills it in; foreign text comes as it is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Twin:
    """A stock LoRA in the repository.

    Attributes:
        rank: of it.
        folder: where it is; "" for the top.
        engines: who reads it as it is, beside PEFT.
    """

    rank: int
    folder: str
    engines: tuple[str, ...] = ()


@dataclass
class CardFacts:
    """What is known of an adapter beyond its configuration.

    Attributes:
        license: of the adapter, as its author gave it.
        base_model: its name on the Hub, where the adapter has another.
        base_license: the licence that the base model's card names.
        dataset: the name of the training data on the Hub.
        settings: name and value, of the training.
        columns: of the curve's table.
        rows: of that table.
        recommended: the rank to keep.
        results: metric and value, at one rank.
        results_rank: that rank.
        picture: the curve's file, beside the card.
        samples: prompts and answers.
        twins: the stock LoRAs in the repository.
        whole: the folder of the adapter with all ranks; "" for the top.
        subfolder: where in the repository the adapter of this card is; "" for the top.
    """

    license: str | None = None
    base_model: str | None = None
    base_license: str | None = None
    dataset: str | None = None
    settings: list[tuple[str, str]] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    recommended: int | None = None
    results: list[tuple[str, float]] = field(default_factory=list)
    results_rank: int | None = None
    picture: str | None = None
    samples: list[str] = field(default_factory=list)
    twins: list[Twin] = field(default_factory=list)
    whole: str = ""
    subfolder: str = ""
