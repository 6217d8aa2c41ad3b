"""List the audio files below a folder as a training manifest: `python scripts/make_manifest.py FOLDER`."""

import argparse
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import sphn

SUFFIXES = {".wav", ".flac", ".mp3", ".ogg"}


def main(arguments: list[str] | None = None) -> int:
    """Write the manifest; returns the exit code, 1 where a file was unreadable or none was found."""
    options = parse(arguments)
    folder: Path = options.folder
    output: Path = options.output or folder / "data.jsonl"
    if not folder.is_dir():
        return complain(f"{folder}: no such folder")
    if output.suffix != ".jsonl":
        return complain(f"--output {output}: not a .jsonl name, which training looks for")
    if not output.parent.is_dir():
        return complain(f"--output {output}: its folder is not there; make it first")
    found = audio_files(folder, options.pattern)
    if not found:
        wanted = options.pattern or f"a name in {', '.join(sorted(SUFFIXES))}"
        return complain(f"{folder}: no file with {wanted} below it")
    durations_sec = sphn.durations([str(path) for path in found])
    readable = [(path, sec) for path, sec in zip(found, durations_sec, strict=True) if sec]
    bad = [path for path, sec in zip(found, durations_sec, strict=True) if not sec]
    for path in bad:
        print(f"skipped: {path}: cannot be decoded, or is empty; convert it to WAV or FLAC", file=sys.stderr)
    if not readable:
        return complain(f"{folder}: none of its {len(found)} audio files can be decoded")
    write_manifest(output, readable)
    total = timedelta(seconds=round(sum(sec for _, sec in readable)))
    print(f"{output}: {len(readable)} files, {total} (h:mm:ss)")
    return 1 if bad else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write a training manifest, one {path, duration} a line, of all audio files below a folder. "
        "Paths are relative to the manifest's folder, durations in seconds. Exit code 1 if a file cannot be "
        "decoded (it is named and left out) or if there is none."
    )
    parser.add_argument("folder", type=Path, help="where the audio files are, at any depth")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the manifest; default: FOLDER/data.jsonl")
    parser.add_argument(
        "--pattern",
        metavar="GLOB",
        help=f"take the files below FOLDER that match, such as '*_stereo.wav'; default: {' '.join(sorted(SUFFIXES))}",
    )
    return parser.parse_args(arguments)


def audio_files(folder: Path, pattern: str | None) -> list[Path]:
    """Files below a folder that match a pattern, or have an audio suffix; hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob(pattern or "*")
        if path.is_file()
        and not path.name.startswith(".")  # such as the `._talk.wav` that macOS leaves on foreign disks
        and (pattern is not None or path.suffix.lower() in SUFFIXES)
    )


def write_manifest(output: Path, recordings: list[tuple[Path, float]]) -> None:
    """Write all lines to a temporary name first, so that the manifest is never seen half written."""
    home = output.parent.resolve()
    temporary = output.with_name(f".{output.name}.part")
    with temporary.open("w") as file:
        for path, duration_sec in recordings:
            # Only the folder is resolved: an audio file that is a link keeps its name, and its transcript's.
            relative = os.path.relpath(path.parent.resolve() / path.name, home)
            file.write(json.dumps({"path": relative, "duration": duration_sec}) + "\n")
    os.replace(temporary, output)


def complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
