//! The query string of a request, and the sizes that may stand in it. Pure.

/// Parameters in order. As in Patroni the first of a repeated name wins, and one without a value is not there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    pub(super) fn parse(text: &str) -> Self {
        let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
        let present = pairs.filter(|(_, value)| !value.is_empty());
        Self(present.map(|(name, value)| (decode(name), decode(value))).collect())
    }

    pub(super) fn first(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    /// The first `tag_<name>` of each name, as name and value.
    pub(super) fn tags(&self) -> impl Iterator<Item = (&str, &str)> {
        let tags = self
            .0
            .iter()
            .filter_map(|(key, _)| key.strip_prefix("tag_").map(|tag| (key, tag)));
        tags.filter_map(|(key, tag)| Some((tag, self.first(key)?)))
    }

    /// The `lag` parameter in bytes; nothing when it is absent or not understood, which both mean that any lag will do.
    pub(super) fn lag(&self) -> Option<i128> {
        parse_bytes(self.first("lag")?)
    }
}

/// A size as PostgreSQL writes it: bytes, or a whole number with a unit.
fn parse_bytes(text: &str) -> Option<i128> {
    let text = text.trim();
    let digits_end = text
        .char_indices()
        .find(|(at, c)| !(c.is_ascii_digit() || (*at == 0 && matches!(c, '-' | '+'))))
        .map_or(text.len(), |(at, _)| at);
    let (number, unit) = text.split_at_checked(digits_end)?;
    let shift = match unit.trim() {
        "" | "B" => 0,
        "kB" => 10,
        "MB" => 20,
        "GB" => 30,
        "TB" => 40,
        _ => return None,
    };
    // Sixty-four bits shifted by forty fit.
    Some(i128::from(number.parse::<i64>().ok()?) << shift)
}

/// Undoes percent-encoding; what is not valid stays as it is.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        match byte {
            b'+' => bytes.push(b' '),
            b'%' => match after
                .split_at_checked(2)
                .and_then(|(pair, after)| Some((hex(pair)?, after)))
            {
                Some((decoded, after)) => {
                    bytes.push(decoded);
                    rest = after;
                }
                None => bytes.push(b'%'),
            },
            other => bytes.push(other),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn hex(pair: &[u8]) -> Option<u8> {
    // A sign would be accepted by the number parser.
    if !pair.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_a_repeated_parameter_wins() {
        let query = Query::parse("lag=1&lag=2&mode=write&empty=&bare");
        assert_eq!(query.first("lag"), Some("1"));
        assert_eq!(query.first("mode"), Some("write"));
        assert_eq!(query.first("empty"), None);
        assert_eq!(query.first("bare"), None);
    }

    #[test]
    fn percent_encoding_is_undone_and_its_wreckage_left_alone() {
        let query = Query::parse("tag_a%20b=c+d&x=%zz%4&y=%C3%A9&z=%+1");
        assert_eq!(query.tags().collect::<Vec<_>>(), [("a b", "c d")]);
        assert_eq!(query.first("x"), Some("%zz%4"));
        assert_eq!(query.first("y"), Some("é"));
        assert_eq!(query.first("z"), Some("% 1"));
    }

    #[test]
    fn a_lag_is_bytes_or_has_a_unit() {
        let lag = |text: &str| Query::parse(&format!("lag={text}")).lag();
        assert_eq!(lag("0"), Some(0));
        assert_eq!(lag("1048576"), Some(1 << 20));
        assert_eq!(lag("10kB"), Some(10 << 10));
        assert_eq!(lag("10+MB"), Some(10 << 20));
        assert_eq!(lag("1GB"), Some(1 << 30));
        assert_eq!(lag("2TB"), Some(2 << 40));
        assert_eq!(lag("-1"), Some(-1));
        for text in ["", "x", "MB", "1mb", "1.5MB", "99999999999999999999", "é"] {
            assert_eq!(lag(text), None, "{text}");
        }
    }
}
