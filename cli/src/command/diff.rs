//! What differs between two texts, as `diff -u` shows it, three lines around each change. Pure.

const CONTEXT: usize = 3;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Line<'a> {
    Same(&'a str),
    Gone(&'a str),
    New(&'a str),
}

/// The difference, with headings that name no file; empty when there is none.
pub(crate) fn unified(before: &str, after: &str) -> String {
    let (before, after): (Vec<&str>, Vec<&str>) = (before.lines().collect(), after.lines().collect());
    let script = script(&before, &after);
    let mut text = String::new();
    for (start, end) in hunks(&script) {
        if text.is_empty() {
            text.push_str("--- \n+++ \n");
        }
        text.push_str(&hunk(&script, start, end));
    }
    text
}

/// How the one becomes the other, by the longest lines that they have in common.
fn script<'a>(before: &[&'a str], after: &[&'a str]) -> Vec<Line<'a>> {
    // lengths[i][j]: the longest common part of before[i..] and after[j..]. Configurations are a few hundred lines.
    let width = after.len() + 1;
    let mut lengths = vec![0_u32; (before.len() + 1) * width];
    let at = |i: usize, j: usize| i * width + j;
    let get = |lengths: &[u32], i: usize, j: usize| lengths.get(at(i, j)).copied().unwrap_or_default();
    for (i, old) in before.iter().enumerate().rev() {
        for (j, new) in after.iter().enumerate().rev() {
            let length = if old == new {
                get(&lengths, i + 1, j + 1) + 1
            } else {
                get(&lengths, i + 1, j).max(get(&lengths, i, j + 1))
            };
            if let Some(cell) = lengths.get_mut(at(i, j)) {
                *cell = length;
            }
        }
    }
    let (mut i, mut j, mut script) = (0, 0, Vec::new());
    loop {
        match (before.get(i), after.get(j)) {
            (Some(old), Some(new)) if old == new => {
                script.push(Line::Same(old));
                (i, j) = (i + 1, j + 1);
            }
            (Some(old), new) if new.is_none() || get(&lengths, i + 1, j) >= get(&lengths, i, j + 1) => {
                script.push(Line::Gone(old));
                i += 1;
            }
            (_, Some(new)) => {
                script.push(Line::New(new));
                j += 1;
            }
            (_, None) => return script,
        }
    }
}

/// Ranges of the script around its changes; those that touch are one.
fn hunks(script: &[Line<'_>]) -> Vec<(usize, usize)> {
    let mut hunks: Vec<(usize, usize)> = Vec::new();
    for (index, line) in script.iter().enumerate() {
        if matches!(line, Line::Same(_)) {
            continue;
        }
        let (start, end) = (index.saturating_sub(CONTEXT), (index + CONTEXT + 1).min(script.len()));
        match hunks.last_mut() {
            Some((_, last)) if start <= *last => *last = end,
            _ => hunks.push((start, end)),
        }
    }
    hunks
}

fn hunk(script: &[Line<'_>], start: usize, end: usize) -> String {
    let count = |lines: &[Line<'_>], counted: fn(&Line<'_>) -> bool| lines.iter().filter(|line| counted(line)).count();
    let old: fn(&Line<'_>) -> bool = |line| !matches!(line, Line::New(_));
    let new: fn(&Line<'_>) -> bool = |line| !matches!(line, Line::Gone(_));
    let (before, within) = (
        script.get(..start).unwrap_or_default(),
        script.get(start..end).unwrap_or_default(),
    );
    let range = |counted| {
        let (first, length) = (count(before, counted), count(within, counted));
        match length {
            0 => format!("{first},0"),
            1 => format!("{}", first + 1),
            _ => format!("{},{length}", first + 1),
        }
    };
    let mut text = format!("@@ -{} +{} @@\n", range(old), range(new));
    for line in within {
        let (sign, line) = match line {
            Line::Same(line) => (' ', line),
            Line::Gone(line) => ('-', line),
            Line::New(line) => ('+', line),
        };
        text.push(sign);
        text.push_str(line);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_shown_as_patronictl_shows_it() {
        let before = "loop_wait: 10\nmaximum_lag_on_failover: 1048576\npostgresql:\n  parameters:\n    max_connections: 50\n    \
                      wal_keep_size: 64MB\n  use_pg_rewind: true\nretry_timeout: 10\nttl: 30\n";
        let expected = "\
--- 
+++ 
@@ -2,7 +2,7 @@
 maximum_lag_on_failover: 1048576
 postgresql:
   parameters:
-    max_connections: 50
+    max_connections: 60
     wal_keep_size: 64MB
   use_pg_rewind: true
 retry_timeout: 10
";
        assert_eq!(unified(before, &before.replace("50", "60")), expected);
        assert_eq!(unified(before, before), "");
    }

    #[test]
    fn ranges_count_as_in_diff() {
        assert_eq!(unified("", "a\n"), "--- \n+++ \n@@ -0,0 +1 @@\n+a\n");
        assert_eq!(unified("a\nb\n", "a\n"), "--- \n+++ \n@@ -1,2 +1 @@\n a\n-b\n");
        let far: Vec<String> = (0..20).map(|n| n.to_string()).collect();
        let changed = far.join("\n").replace("\n2\n", "\nx\n").replace("\n17\n", "\ny\n");
        assert_eq!(unified(&far.join("\n"), &changed).matches("@@ -").count(), 2);
    }
}
