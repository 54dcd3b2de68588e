//! Puts the git revision and the target into `--version`; compiles nothing.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=.git/logs/HEAD");
    let git = Command::new("git").args(["rev-parse", "--short", "HEAD"]).output();
    let revision = git.ok().filter(|output| output.status.success());
    let revision = revision.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let version = std::env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let target = std::env::var("TARGET").unwrap_or_default();
    // A source archive has no revision.
    let facts = revision.into_iter().chain([target]).collect::<Vec<_>>().join(", ");
    println!("cargo:rustc-env=PARAM_VERSION={version} ({facts})");
}
