#!/usr/bin/env bash
# Builds the sdist and the wheel into dist/ with the locked hatchling, and tries each in a fresh venv.
#
# Each venv gets the locked dependencies and the package, and then has to say its version and bring a new SQLite
# database to this release's schema. `make package` calls this, after it has made .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "package: $*" >&2
  exit 1
}

root=$PWD
uv() {
  UV_NO_CONFIG=1 "$root/.venv/bin/uv" "$@"
}

version=$(.venv/bin/hatchling version)
wheel=dist/voicetx-$version-py3-none-any.whl
sdist=dist/voicetx-$version.tar.gz
rm -f "$wheel" "$sdist"
.venv/bin/hatchling build --directory dist --target sdist --target wheel

work=$(mktemp -d --tmpdir voicetx-package.XXXXXX)
trap 'rm -rf "$work"' EXIT

for package in "$wheel" "$sdist"; do
  [ -f "$package" ] || fail "hatchling did not make $package."
  place=$work/${package##*.}
  uv venv --quiet --python .venv/bin/python "$place"
  python=$place/bin/python
  uv pip install --quiet --python "$python" --require-hashes --requirement requirements-build.lock
  uv pip install --quiet --python "$python" --require-hashes --requirement requirements.lock
  uv pip install --quiet --python "$python" --no-deps --no-build-isolation "$package"
  # From a folder of its own, so that neither the sources nor a .env beside them are found.
  (
    cd "$place"
    said=$(bin/voicetx --version)
    [ "$said" = "voicetx $version" ] || fail "$package says \"$said\", and pyproject.toml says $version."
    export VOICETX_DATABASE_URL=sqlite:///$place/tried.db
    bin/voicetx db upgrade
    bin/voicetx db check
  )
  echo "package: $package works."
done
