//! What goes to standard output: listings as a table or as data, and plain text.
//!
//! Invariant: the data forms hold the same facts as the wide table, under stable camelCase keys; a reader that goes
//! away early (`| head`) is not an error.

use std::io::{ErrorKind, Write};

use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use crate::failure::{Failure, Result};

/// Form of a listing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// For people.
    #[default]
    Table,
    /// For people, with every column.
    Wide,
    /// For programs.
    Json,
    /// For programs and people.
    Yaml,
}

/// A column of a table.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    /// Heading.
    pub name: &'static str,
    /// Shown by `-o wide` only.
    pub wide: bool,
}

/// A column that is always shown.
pub const fn column(name: &'static str) -> Column {
    Column { name, wide: false }
}

/// A column of `-o wide`.
pub const fn wide(name: &'static str) -> Column {
    Column { name, wide: true }
}

/// Prints items: as rows under columns, or as the items themselves.
///
/// # Errors
/// If standard output cannot be written.
pub fn print_list<T: Serialize>(format: OutputFormat, items: &[T], columns: &[Column], row: impl Fn(&T) -> Vec<String>) -> Result<()> {
    let shown = |column: &Column| format == OutputFormat::Wide || !column.wide;
    match format {
        OutputFormat::Json | OutputFormat::Yaml => print_data(format, items),
        OutputFormat::Table | OutputFormat::Wide => {
            let mut table = plain_table();
            table.set_header(columns.iter().filter(|column| shown(column)).map(|column| column.name));
            for item in items {
                let cells = row(item).into_iter().zip(columns).filter(|(_, column)| shown(column));
                table.add_row(cells.map(|(cell, _)| cell));
            }
            print_text(&trimmed(&table))
        }
    }
}

/// Prints named facts about one thing, or the thing itself.
///
/// # Errors
/// If standard output cannot be written.
pub fn print_facts<T: Serialize>(format: OutputFormat, item: &T, facts: &[(&str, String)]) -> Result<()> {
    match format {
        OutputFormat::Json | OutputFormat::Yaml => print_data(format, item),
        OutputFormat::Table | OutputFormat::Wide => {
            let mut table = plain_table();
            for (name, value) in facts {
                table.add_row([*name, value]);
            }
            print_text(&trimmed(&table))
        }
    }
}

fn plain_table() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table
}

/// The table's text without the spaces that pad the last column and begin the first.
fn trimmed(table: &Table) -> String {
    let lines = table.to_string();
    lines.lines().map(|line| line.strip_prefix(' ').unwrap_or(line).trim_end().to_owned() + "\n").collect()
}

fn print_data<T: Serialize + ?Sized>(format: OutputFormat, item: &T) -> Result<()> {
    let text = match format {
        OutputFormat::Yaml => serde_yaml_ng::to_string(item).map_err(|error| Failure::of(&error))?,
        _ => serde_json::to_string_pretty(item).map_err(|error| Failure::of(&error))? + "\n",
    };
    print_text(&text)
}

/// Prints text as it is, and flushes it.
///
/// # Errors
/// If standard output cannot be written; a closed pipe is no error.
pub fn print_text(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Failure::of(&error).while_doing("could not write to standard output")),
        _ => Ok(()),
    }
}

/// A number of parameters as people say it: `135M`, `1.5B`.
pub fn short_count(count: u64) -> String {
    match count {
        0..1_000 => count.to_string(),
        1_000..1_000_000 => format!("{:.0}K", count as f64 / 1e3),
        1_000_000..999_500_000 => format!("{:.0}M", count as f64 / 1e6),
        _ => format!("{:.1}B", count as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_short() {
        for (count, text) in [(7, "7"), (4096, "4K"), (134_515_008, "135M"), (999_885_952, "1.0B"), (1_543_714_304, "1.5B")] {
            assert_eq!(short_count(count), text);
        }
    }

    #[test]
    fn a_table_has_no_frame_and_no_trailing_spaces() {
        let mut table = plain_table();
        table.set_header(["NAME", "SIZE"]).add_row(["a", "1"]).add_row(["longer", "2"]);
        assert_eq!(trimmed(&table), "NAME    SIZE\na       1\nlonger  2\n");
    }
}
