#!/usr/bin/env bash
# Makes a release of the version that pyproject.toml names; `make release` calls this.
#
# What takes no time is asked first. The tag is made last, so a version that has a tag has passed everything.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "release: $*" >&2
  exit 1
}

refuse_changes() {
  [ -z "$(git status --porcelain)" ] || fail "commit or put away what has changed first (git status shows it)."
}

refuse_changes
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
[ -n "$version" ] || fail "pyproject.toml names no version."
if git rev-parse --quiet --verify "refs/tags/v$version" >/dev/null; then
  fail "the tag v$version is there already: write the new version in pyproject.toml."
fi
grep -qE "^## \[${version//./\\.}\] - [0-9]{4}-[0-9]{2}-[0-9]{2}$" CHANGELOG.md ||
  fail "CHANGELOG.md has no section \"## [$version] - YYYY-MM-DD\"."

commit=$(git rev-parse HEAD)
make check test
make package
refuse_changes
[ "$(git rev-parse HEAD)" = "$commit" ] || fail "another commit was checked out meanwhile: start again."
git tag --annotate --message "voicetx $version" "v$version" "$commit"
echo "release: v$version is tagged, and dist/ has its packages."
