//! `forgectl get -w`: what is there, and from then on what looks different.
//!
//! What it is not: it reads no stream and prints nothing; [`super::get`] does.
//!
//! Invariant: a row is shown when what it shows changed, and never twice alike; times that only grow are no change.

use std::collections::BTreeMap;

use forge_shared::cluster::event::Object;
use serde_json::{Value, json};

use super::{data, get, rows};
use crate::cli::cluster::{GetArgs, Listed};
use crate::failure::{Failure, Result};
use crate::output::{Column, OutputFormat};

/// Columns whose text changes by itself.
const CLOCKS: [&str; 2] = ["SINCE", "CREATED"];

/// One line of a listing.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    /// In words.
    key: String,
    /// As data.
    id: Value,
    /// What is shown: cells of a table, or the item's data as one.
    cells: Vec<String>,
}

/// What was shown of each object.
pub(super) struct View<'a> {
    args: &'a GetArgs,
    shown: BTreeMap<String, Vec<Row>>,
    /// Of the table's columns that are shown, and how wide each is.
    columns: Vec<(Column, usize)>,
}

impl<'a> View<'a> {
    /// A view of what is there at the beginning, and its text.
    ///
    /// # Errors
    /// None that plain data could cause; the serializers' own, here and below.
    pub(super) fn begin(args: &'a GetArgs, objects: &[Object]) -> Result<(Self, String)> {
        let all = get::columns(args.kind).iter();
        let columns = all.filter(|column| args.output == OutputFormat::Wide || !column.wide).map(|column| (*column, column.name.len()));
        let mut view = View { args, shown: BTreeMap::new(), columns: columns.collect() };
        let listed = objects.iter().map(|object| view.rows(object)).collect::<Result<Vec<_>>>()?;
        for row in listed.iter().flatten() {
            for ((_, width), cell) in view.columns.iter_mut().zip(&row.cells) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let headings: Vec<String> = view.columns.iter().map(|(column, _)| column.name.to_owned()).collect();
        let mut text = if view.is_table() { view.line(&headings) } else { String::new() };
        text.extend(listed.iter().flatten().map(|row| view.line(&row.cells)));
        view.shown = objects.iter().map(Object::name).zip(listed).collect();
        Ok((view, text))
    }

    /// What is different about an object.
    ///
    /// # Errors
    /// As [`View::begin`].
    pub(super) fn put(&mut self, object: &Object) -> Result<String> {
        let rows = self.rows(object)?;
        let before = self.shown.remove(&object.name()).unwrap_or_default();
        let mut text = String::new();
        for row in &rows {
            let known = before.iter().find(|known| known.id == row.id);
            if known.is_none_or(|known| self.without_clocks(known) != self.without_clocks(row)) {
                text.push_str(&self.line(&row.cells));
            }
        }
        for gone in before.iter().filter(|known| rows.iter().all(|row| row.id != known.id)) {
            text.push_str(&self.farewell(gone)?);
        }
        self.shown.insert(object.name(), rows);
        Ok(text)
    }

    /// That an object is gone.
    ///
    /// # Errors
    /// As [`View::begin`].
    pub(super) fn gone(&mut self, name: &str) -> Result<String> {
        self.shown.remove(name).unwrap_or_default().iter().map(|row| self.farewell(row)).collect()
    }

    /// All there is, after a gap.
    ///
    /// # Errors
    /// As [`View::begin`].
    pub(super) fn replace(&mut self, objects: &[Object]) -> Result<String> {
        let names: Vec<String> = objects.iter().map(Object::name).collect();
        let gone: Vec<String> = self.shown.keys().filter(|name| !names.contains(name)).cloned().collect();
        let mut text = String::new();
        for name in gone {
            // Old events are forgotten, which is no event.
            if self.args.kind == Listed::Events {
                self.shown.remove(&name);
            } else {
                text.push_str(&self.gone(&name)?);
            }
        }
        for object in objects {
            text.push_str(&self.put(object)?);
        }
        Ok(text)
    }

    fn is_table(&self) -> bool {
        matches!(self.args.output, OutputFormat::Table | OutputFormat::Wide)
    }

    fn rows(&self, object: &Object) -> Result<Vec<Row>> {
        let ids: Vec<(String, Value)> = match (self.args.kind, object) {
            (Listed::Placements, Object::Service(service)) => rows::placed(service).iter().map(place).collect(),
            _ => vec![(object.name(), json!(object.name()))],
        };
        let cells: Vec<Vec<String>> = match self.args.output {
            OutputFormat::Table | OutputFormat::Wide => {
                let (columns, rows) = get::table(self.args.kind, std::slice::from_ref(object));
                let is_shown = |column: &Column| self.args.output == OutputFormat::Wide || !column.wide;
                let rows = rows.into_iter().map(|row| row.into_iter().zip(columns).filter(|(_, column)| is_shown(column)));
                rows.map(|row| row.map(|(cell, _)| cell).collect()).collect()
            }
            OutputFormat::Json => data::objects(self.args.kind, object)?.iter().map(|item| vec![format!("{item}\n")]).collect(),
            OutputFormat::Yaml => {
                let text = |item: &Value| serde_yaml_ng::to_string(item).map_err(|error| Failure::of(&error));
                data::objects(self.args.kind, object)?
                    .iter()
                    .map(|item| Ok(vec![format!("---\n{}", text(item)?)]))
                    .collect::<Result<_>>()?
            }
        };
        Ok(ids.into_iter().zip(cells).map(|((key, id), cells)| Row { key, id, cells }).collect())
    }

    fn without_clocks<'r>(&self, row: &'r Row) -> Vec<&'r str> {
        let is_clock = |index: usize| self.is_table() && self.columns.get(index).is_some_and(|(column, _)| CLOCKS.contains(&column.name));
        row.cells.iter().enumerate().filter(|(index, _)| !is_clock(*index)).map(|(_, cell)| cell.as_str()).collect()
    }

    fn line(&self, cells: &[String]) -> String {
        if !self.is_table() {
            return cells.concat();
        }
        let padded: Vec<String> = cells.iter().zip(&self.columns).map(|(cell, (_, width))| format!("{cell:width$}")).collect();
        format!("{}\n", padded.join("  ").trim_end())
    }

    fn farewell(&self, row: &Row) -> Result<String> {
        let deleted = json!({ "deleted": row.id });
        Ok(match self.args.output {
            OutputFormat::Table | OutputFormat::Wide => format!("{} is gone\n", row.key),
            OutputFormat::Json => format!("{deleted}\n"),
            OutputFormat::Yaml => format!("---\n{}", serde_yaml_ng::to_string(&deleted).map_err(|error| Failure::of(&error))?),
        })
    }
}

/// What tells a rank of a replica from every other, in words and as data.
fn place(placed: &rows::Placed<'_>) -> (String, Value) {
    let (plan, rank) = (placed.plan, placed.rank.0);
    let of_rank = if plan.ranks.len() > 1 { format!(", rank {rank},") } else { String::new() };
    let id = json!({ "replica": plan.replica.to_string(), "rank": rank, "epoch": plan.epoch });
    (format!("{}{of_rank} of epoch {}", plan.replica, plan.epoch), id)
}

#[cfg(test)]
mod tests {
    use forge_shared::cluster::node::{NodePhase, NodeRecord, NodeSpec, Role};
    use forge_shared::ids::{Incarnation, NodeId};

    use super::*;
    use crate::cli::cluster::ServerArgs;

    fn args(kind: Listed, output: OutputFormat) -> GetArgs {
        GetArgs { kind, name: None, output, watch: true, server: ServerArgs::default() }
    }

    fn node(name: &str, version: &str, since_ms: u64, phase: NodePhase) -> Object {
        let spec = NodeSpec {
            id: NodeId::from(name),
            role: Role::Gateway,
            incarnation: Incarnation(1),
            version: version.into(),
            level: forge_shared::version::LEVEL,
            address: "h:1".into(),
            metrics_address: "h:2".into(),
            data_plane: None,
            devices: Vec::new(),
        };
        let record = NodeRecord { spec, phase, cordoned: false, draining: false, is_forced: false, reason: String::new(), since_ms };
        Object::Node(Box::new(record))
    }

    #[test]
    fn a_row_is_shown_when_what_it_shows_changed() {
        let args = args(Listed::Nodes, OutputFormat::Table);
        let (mut view, text) = View::begin(&args, &[node("gateway-1", "1", 0, NodePhase::Ready)]).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.len() == 2 && lines[0].starts_with("NAME       ROLE ") && lines[1].starts_with("gateway-1  gateway "), "{text}");
        // The version stands in a wide column, and the clock runs by itself.
        assert_eq!(view.put(&node("gateway-1", "2", crate::time::Utc::now().0 * 1000, NodePhase::Ready)).unwrap(), "");
        let lost = view.put(&node("gateway-1", "2", 0, NodePhase::Lost)).unwrap();
        assert!(lost.starts_with("gateway-1  gateway  lost") && lost.lines().count() == 1, "{lost}");
        assert!(view.put(&node("g2", "2", 0, NodePhase::Ready)).unwrap().starts_with("g2         gateway  ready"));
        assert_eq!(view.gone("g2").unwrap(), "g2 is gone\n");
        assert_eq!(view.gone("g2").unwrap(), "", "once");
        let after = view.replace(&[node("g3", "1", 0, NodePhase::Ready)]).unwrap();
        assert!(after.starts_with("gateway-1 is gone\ng3 ") && after.lines().count() == 2, "{after}");
    }

    #[test]
    fn as_data_there_is_one_line_for_each_change() {
        let args = args(Listed::Nodes, OutputFormat::Json);
        let (mut view, text) = View::begin(&args, &[node("a", "1", 0, NodePhase::Ready)]).unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        assert!(text.ends_with('\n') && text.lines().count() == 1 && value["sinceMs"] == 0, "{text}");
        assert_eq!(view.put(&node("a", "1", 0, NodePhase::Ready)).unwrap(), "");
        assert_eq!(view.put(&node("a", "2", 0, NodePhase::Ready)).unwrap().lines().count(), 1);
        assert_eq!(view.gone("a").unwrap(), "{\"deleted\":\"a\"}\n");
    }
}
