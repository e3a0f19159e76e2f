//! Boxes around columns, as patronictl draws them.

/// A column: its heading, and on which side its cells stand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column<'a> {
    pub(crate) heading: &'a str,
    pub(crate) right: bool,
}

/// Draws `rows` under `title`, which stands in the top border and is cut where that ends. Rules are drawn between rows as
/// soon as any cell has several lines.
pub(crate) fn draw(title: &str, columns: &[Column<'_>], rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> = columns
        .iter()
        .enumerate()
        .map(|(index, column)| width(column, index, rows))
        .collect();
    let rule = rule(&widths);
    let mut lines = vec![titled(&rule, title)];
    lines.push(line(columns, &widths, columns.iter().map(|column| column.heading)));
    lines.push(rule.clone());
    let ruled = rows.iter().flatten().any(|cell| cell.contains('\n'));
    for (index, row) in rows.iter().enumerate() {
        if ruled && index > 0 {
            lines.push(rule.clone());
        }
        let height = row.iter().map(|cell| cell.lines().count()).max().unwrap_or(1).max(1);
        for at in 0..height {
            lines.push(line(
                columns,
                &widths,
                row.iter().map(|cell| cell.lines().nth(at).unwrap_or_default()),
            ));
        }
    }
    lines.push(rule);
    lines.join("\n")
}

fn width(column: &Column<'_>, index: usize, rows: &[Vec<String>]) -> usize {
    let cells = rows
        .iter()
        .filter_map(|row| row.get(index))
        .flat_map(|cell| cell.lines());
    cells
        .chain([column.heading])
        .map(|text| text.chars().count())
        .max()
        .unwrap_or_default()
}

fn rule(widths: &[usize]) -> String {
    let mut rule = String::from("+");
    for width in widths {
        rule.push_str(&"-".repeat(width + 2));
        rule.push('+');
    }
    rule
}

/// The title takes the place of the border's characters, from the second to the last but one.
fn titled(rule: &str, title: &str) -> String {
    let room = rule.len().saturating_sub(2);
    let title: String = title.chars().take(room).collect();
    let rest: String = rule.chars().skip(1 + title.chars().count()).collect();
    format!("+{title}{rest}")
}

fn line<'a>(columns: &[Column<'_>], widths: &[usize], cells: impl Iterator<Item = &'a str>) -> String {
    let mut line = String::from("|");
    for ((column, width), cell) in columns.iter().zip(widths).zip(cells) {
        let padded = if column.right {
            format!(" {cell:>width$} |")
        } else {
            format!(" {cell:<width$} |")
        };
        line.push_str(&padded);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column<'static>; 2] = [
        Column {
            heading: "Name",
            right: false,
        },
        Column {
            heading: "N",
            right: true,
        },
    ];

    #[test]
    fn an_empty_table_has_two_rules_below_its_headings() {
        assert_eq!(
            draw(" T ", &COLUMNS, &[]),
            "+ T ---+---+\n| Name | N |\n+------+---+\n+------+---+"
        );
    }

    #[test]
    fn a_long_title_is_cut_at_the_border() {
        assert_eq!(
            draw(" a title too long ", &COLUMNS, &[]).lines().next(),
            Some("+ a title t+")
        );
    }

    #[test]
    fn cells_of_several_lines_bring_rules() {
        let rows = [
            vec!["a\nbb".to_owned(), "1".to_owned()],
            vec!["c".to_owned(), "22".to_owned()],
        ];
        let expected = "\
+------+----+
| Name |  N |
+------+----+
| a    |  1 |
| bb   |    |
+------+----+
| c    | 22 |
+------+----+";
        assert_eq!(draw("", &COLUMNS, &rows), expected);
    }

    #[test]
    fn width_is_counted_in_characters() {
        let rows = [vec!["ééééé".to_owned(), String::new()]];
        assert_eq!(draw("", &COLUMNS, &rows).lines().nth(1), Some("| Name  | N |"));
    }
}
