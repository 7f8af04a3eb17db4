"""Schedules on disk: TOML carries all of a schedule, CSV the plain table of layers and sites."""

import csv
import io
import json
import logging
import tomllib
from pathlib import Path

from tinydrug.errors import DrugError
from tinydrug.noise.checks import at, find, shown
from tinydrug.noise.dose import Dose, parse_theta
from tinydrug.noise.drift import TERMS
from tinydrug.noise.laws import KINDS
from tinydrug.noise.schedule import OPTIONS, SOBER, Schedule
from tinydrug.noise.sites import SITES, find_site
from tinydrug.noise.time import parse_time

log = logging.getLogger("tinydrug")

CELLS = ("layer", "site", "theta")
CHOICES = (*KINDS, "time")  # cells that are the same in all lines of a site
MAX_LAYERS = 10_000  # a CSV table is held dense: a mistyped layer number must not fill the memory


def load_schedule(path: str | Path) -> Schedule:
    """The schedule in a .toml or .csv file. Raises DrugError naming the file and the line or key."""
    path = Path(path)
    with at(str(path)):
        read, _ = _format(path)
        try:
            text = path.read_text("utf-8-sig")  # spreadsheets write a byte order mark
        except OSError as error:
            raise DrugError(f"cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise DrugError("is not UTF-8 text") from None
        return read(text)


def save_schedule(schedule: Schedule, path: str | Path, n_layers: int | None = None) -> None:
    """Write a .toml or .csv file.

    CSV needs the number of layers and holds the table alone: theta with profile and scale applied, but not
    sink, prompt and seed. Raises DrugError naming the file.
    """
    path = Path(path)
    with at(str(path)):
        _, write = _format(path)
        text = write(schedule, n_layers)
        try:
            path.write_text(text, "utf-8", newline="\n")
        except OSError as error:
            raise DrugError(f"cannot be written: {error.strerror}") from None


def _format(path: Path) -> tuple:
    """The functions (read, write) for this suffix."""
    if path.suffix.lower() not in FORMATS:
        raise DrugError(f"a drug file ends in {' or '.join(FORMATS)}")
    return FORMATS[path.suffix.lower()]


def read_toml(text: str) -> Schedule:
    """A schedule from TOML: options and [[dose]] tables. Raises DrugError naming the line or the key."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # endless digits and endless nesting are no TOMLDecodeError
        raise DrugError(f"is not TOML: {error}") from None
    return Schedule.from_dict(data)


def write_toml(schedule: Schedule, n_layers: int | None = None) -> str:
    """All of a schedule as TOML; `n_layers` does not matter to it."""
    data = schedule.to_dict()
    lines = [f"{name} = {_toml(data[name])}" for name in (*OPTIONS, *TERMS) if data.get(name) is not None]
    for dose in data["dose"]:
        lines += ["", "[[dose]]", *(f"{key} = {_toml(value)}" for key, value in dose.items())]
    return "\n".join(lines) + "\n"


def _toml(value: dict | list | str | float) -> str:
    match value:
        case dict():
            return f"{{ {', '.join(f'{key} = {_toml(item)}' for key, item in value.items())} }}"
        case list():
            return f"[{', '.join(map(_toml, value))}]"
        case bool():
            return "true" if value else "false"
        case str():
            return json.dumps(value, ensure_ascii=False)  # a JSON string is a TOML string
        case _:
            return repr(value)


def read_csv(text: str) -> Schedule:
    """A schedule from CSV: a header layer,site,theta[,law,form,angle,time], then a line a layer and site.

    Layers without a line get no noise. Raises DrugError naming the line.
    """
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    thetas: dict[str, dict[int, float]] = {}  # by site and layer
    kinds: dict[str, dict] = {}  # by site: law, form, angle, time
    try:
        for row in rows:
            with at(f"line {rows.line_num}"):
                row = [cell.strip() for cell in row]
                if header and any(row):
                    _read_row(header, row, thetas, kinds)
                elif any(row):
                    header = _read_header(row)
    except csv.Error as error:
        raise DrugError(f"line {rows.line_num}: is not CSV: {error}") from None
    if not header:
        raise DrugError(f"is empty: its first line should be {','.join(CELLS)}")
    n_layers = 1 + max((layer for column in thetas.values() for layer in column), default=0)
    doses = []
    for site, column in thetas.items():
        doses.append(Dose(site, tuple(column.get(layer, 0.0) for layer in range(n_layers)), **kinds[site]))
    return Schedule(tuple(doses))


def _read_header(row: list[str]) -> list[str]:
    header = [cell.lower() for cell in row]
    if not set(CELLS) <= set(header) <= {*CELLS, *CHOICES} or len(set(header)) < len(header):
        raise DrugError(
            f"the header should be {','.join(CELLS)}[,{','.join(CHOICES)}], not {shown(','.join(row))}"
        )
    return header


def _read_row(header: list[str], row: list[str], thetas: dict, kinds: dict) -> None:
    """Check one line and put it into the columns of its site."""
    if len(row) != len(header):
        raise DrugError(f"has {len(row)} cells, the header has {len(header)}")
    cells = dict(zip(header, row, strict=True))
    layer, theta = cells["layer"], parse_theta(cells["theta"])
    if not (layer.isascii() and layer.isdigit() and len(layer) < 10 and int(layer) < MAX_LAYERS):
        raise DrugError(f"layer {shown(layer)} is not a whole number from 0 to {MAX_LAYERS - 1}")
    if not isinstance(theta, float):
        several = "more than one angle" if isinstance(theta, tuple) else "no angle, which this table holds"
        raise DrugError(f"theta {shown(cells['theta'])} is {several}")
    site = find_site(cells["site"]).letter
    column = thetas.setdefault(site, {})
    if int(layer) in column:
        raise DrugError(f"layer {layer} of site {site} is given twice")
    column[int(layer)] = theta
    chosen = {}
    for kind, registry in KINDS.items():
        chosen[kind] = find(registry, cells.get(kind) or next(iter(registry)), kind)
    chosen["time"] = parse_time([word for word in cells.get("time", "").split("+") if word])
    if kinds.setdefault(site, chosen) != chosen:
        raise DrugError(
            f"{', '.join(CHOICES)} of site {site} differ from an earlier line: a site has one of each"
        )


def write_csv(schedule: Schedule, n_layers: int | None) -> str:
    """The table as CSV, a line for every layer of every dosed site. Raises DrugError without `n_layers`."""
    if n_layers is None:
        raise DrugError("a CSV table needs the number of layers")
    lost = [
        name for name in ("sink", "prompt", "seed", *TERMS) if getattr(schedule, name) != getattr(SOBER, name)
    ]
    if lost:
        log.warning("a CSV file holds the table alone, without %s: save .toml to keep all", ", ".join(lost))
    table = schedule.table(n_layers)["theta"]  # (L, n_sites)
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow((*CELLS, *CHOICES))
    for layer in range(n_layers):
        for dose in schedule.doses:
            theta = float(table[layer, SITES[dose.site].code])
            rows.writerow((layer, dose.site, repr(theta), *(str(getattr(dose, kind)) for kind in CHOICES)))
    return out.getvalue()


FORMATS = {".toml": (read_toml, write_toml), ".csv": (read_csv, write_csv)}  # (read, write) by suffix
