//! `stanchion completions` and `stanchion man`: both made from the command line's own definition.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Command;
use clap_complete::Shell;

/// Flags of `completions`.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct CompletionsArgs {
    /// bash: stanchion completions bash > /etc/bash_completion.d/stanchion
    shell: Shell,
}

/// Flags of `man`.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct ManArgs {
    /// Write one page a command into this directory instead of the first one to standard output
    #[arg(long)]
    dir: Option<PathBuf>,
}

/// Prints the completions of a shell.
pub(crate) fn completions(args: &CompletionsArgs, mut command: Command) -> Result<ExitCode> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut command, "stanchion", &mut text);
    std::io::stdout().write_all(&text).context("write the completions")?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the manual page, or writes all of them.
pub(crate) fn man(args: &ManArgs, mut command: Command) -> Result<ExitCode> {
    command.build();
    match &args.dir {
        None => std::io::stdout().write_all(&page(&command, "stanchion")?).context("write the page")?,
        Some(directory) => {
            std::fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
            write_pages(&command, "", directory)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn page(command: &Command, title: &str) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    clap_mangen::Man::new(command.clone()).title(title).render(&mut text).context("make the page")?;
    Ok(text)
}

/// `stanchion.1`, `stanchion-policy-explain.1` ...
fn write_pages(command: &Command, parent: &str, directory: &Path) -> Result<()> {
    let name = if parent.is_empty() { command.get_name().to_owned() } else { format!("{parent}-{}", command.get_name()) };
    let path = directory.join(format!("{name}.1"));
    std::fs::write(&path, page(command, &name)?).with_context(|| format!("write {}", path.display()))?;
    for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help" && !sub.is_hide_set()) {
        write_pages(sub, &name, directory)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn every_command_has_a_page_that_names_it() {
        fn count(command: &Command) -> usize {
            1 + command.get_subcommands().filter(|sub| sub.get_name() != "help" && !sub.is_hide_set()).map(count).sum::<usize>()
        }
        let directory = tempfile::tempdir().expect("a directory");
        let mut command = crate::Args::command();
        command.build();
        man(&ManArgs { dir: Some(directory.path().join("man1")) }, command.clone()).expect("written");
        let pages: Vec<_> =
            std::fs::read_dir(directory.path().join("man1")).expect("made").map(|page| page.expect("read").path()).collect();
        assert_eq!(pages.len(), count(&command));
        for page in pages {
            let name = page.file_stem().expect("a name").to_string_lossy().into_owned();
            let text = std::fs::read_to_string(&page).expect("text");
            assert!(name.starts_with("stanchion") && text.contains(&name.replace('-', "\\-")), "{name}");
        }
    }
}
