//! Rows in patronictl's output formats. Pure.

use serde_json::{Map, Value};

use super::table::{self, Column};
use super::yaml_text;
use crate::args::Format;

/// Rows under headings; none for rows whose columns have no names.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Rows {
    pub(crate) headings: Vec<String>,
    /// Which columns stand on the right.
    pub(crate) right: Vec<bool>,
    pub(crate) rows: Vec<Vec<Value>>,
}

impl Rows {
    /// The whole output, with its last newline.
    pub(crate) fn render(&self, format: Format, delimiter: &str) -> String {
        match format {
            Format::Pretty => self.pretty(),
            Format::Tsv => {
                let headings = (!self.headings.is_empty()).then(|| self.headings.clone());
                let rows = self.rows.iter().map(|row| row.iter().map(text).collect());
                let lines = headings.into_iter().chain(rows);
                lines.map(|line: Vec<String>| line.join(delimiter) + "\n").collect()
            }
            Format::Json => format!("{}\n", spaced_json(&self.objects())),
            // Patroni's ends with an empty line.
            Format::Yaml => format!("{}\n", yaml_text::document(&self.objects())),
        }
    }

    fn objects(&self) -> Value {
        let object = |row: &Vec<Value>| {
            let fields = self.headings.iter().cloned().zip(row.iter().cloned());
            Value::Object(fields.collect::<Map<_, _>>())
        };
        Value::Array(self.rows.iter().map(object).collect())
    }

    fn pretty(&self) -> String {
        let width = self.rows.first().map_or(self.headings.len(), Vec::len);
        let unnamed: Vec<String> = (1..=width).map(|number| format!("Field {number}")).collect();
        let headings = if self.headings.is_empty() {
            &unnamed
        } else {
            &self.headings
        };
        let columns: Vec<Column<'_>> = headings
            .iter()
            .enumerate()
            .map(|(index, heading)| Column {
                heading,
                right: self.right.get(index).copied().unwrap_or_default(),
            })
            .collect();
        let rows: Vec<Vec<String>> = self.rows.iter().map(|row| row.iter().map(text).collect()).collect();
        table::draw("", &columns, &rows) + "\n"
    }
}

/// A cell.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => spaced_json(other),
    }
}

/// JSON with a space after each comma and colon, as Python writes it.
pub(crate) fn spaced_json(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("[{}]", items.iter().map(spaced_json).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            let fields = map
                .iter()
                .map(|(key, value)| format!("{}: {}", Value::from(key.as_str()), spaced_json(value)));
            format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rows() -> Rows {
        Rows {
            headings: vec!["a".to_owned(), "b".to_owned()],
            right: vec![true, false],
            rows: vec![vec![json!("10"), json!(null)], vec![json!(2), json!("x")]],
        }
    }

    #[test]
    fn rows_take_every_form() {
        assert_eq!(rows().render(Format::Tsv, "\t"), "a\tb\n10\t\n2\tx\n");
        assert_eq!(rows().render(Format::Tsv, ";"), "a;b\n10;\n2;x\n");
        assert_eq!(
            rows().render(Format::Json, ""),
            "[{\"a\": \"10\", \"b\": null}, {\"a\": 2, \"b\": \"x\"}]\n"
        );
        assert_eq!(
            rows().render(Format::Yaml, ""),
            "- a: '10'\n  b: null\n- a: 2\n  b: x\n\n"
        );
        let table = "+----+---+\n|  a | b |\n+----+---+\n| 10 |   |\n|  2 | x |\n+----+---+\n";
        assert_eq!(rows().render(Format::Pretty, ""), table);
        let unnamed = Rows {
            rows: vec![vec![json!("2026"), json!("ERROR")]],
            ..Rows::default()
        };
        assert!(unnamed.render(Format::Pretty, "").contains("| Field 1 | Field 2 |"));
    }
}
