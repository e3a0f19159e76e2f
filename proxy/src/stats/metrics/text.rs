//! Samples in Prometheus' text format that the registry has no type for: histograms that were counted elsewhere, and names
//! of other programs.

use std::fmt::Write;

use crate::histogram::Buckets;

/// The text of some metrics.
#[derive(Default)]
pub(super) struct Page(String);

impl Page {
    pub(super) fn into_text(self) -> String {
        self.0
    }

    /// Begins a metric; its samples follow.
    pub(super) fn metric(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a text cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// One sample of it.
    pub(super) fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let labels: Vec<String> = labels
            .iter()
            .map(|(key, text)| format!("{key}=\"{}\"", escaped(text)))
            .collect();
        let labels = match labels.is_empty() {
            true => String::new(),
            false => format!("{{{}}}", labels.join(",")),
        };
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }

    /// A histogram with one label.
    pub(super) fn histogram<'a>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        each: impl IntoIterator<Item = (&'a str, Buckets)>,
    ) {
        self.metric(name, "histogram", help);
        for (value, buckets) in each {
            for (bound, count) in &buckets.cumulative {
                let bound = bound.to_string();
                self.sample(&format!("{name}_bucket"), &[(label, value), ("le", &bound)], count);
            }
            self.sample(
                &format!("{name}_bucket"),
                &[(label, value), ("le", "+Inf")],
                buckets.count,
            );
            self.sample(&format!("{name}_sum"), &[(label, value)], buckets.sum);
            self.sample(&format!("{name}_count"), &[(label, value)], buckets.count);
        }
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::histogram::Histogram;

    #[test]
    fn a_histogram_is_written_as_prometheus_reads_it() {
        let histogram = Histogram::default();
        histogram.observe(Duration::from_millis(3));
        histogram.observe(Duration::from_secs(60));
        let mut page = Page::default();
        page.histogram("h", "Help.", "node", [("a\"b", histogram.buckets())]);
        let text = page.into_text();
        assert!(
            text.starts_with("# HELP h Help.\n# TYPE h histogram\nh_bucket{node=\"a\\\"b\",le=\"0.00025\"} 0\n"),
            "{text}"
        );
        assert!(
            text.contains("le=\"0.005\"} 1\n") && text.contains("le=\"30\"} 1\n"),
            "{text}"
        );
        assert!(
            text.ends_with("le=\"+Inf\"} 2\nh_sum{node=\"a\\\"b\"} 60.003\nh_count{node=\"a\\\"b\"} 2\n"),
            "{text}"
        );
    }
}
