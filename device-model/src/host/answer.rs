//! What the host answers to words: named values, for whoever makes text or JSON of them.

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::observe::Fields;

/// Named values in order. Serialised with `serde`, a map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer(pub Vec<(&'static str, Value)>);

/// One value of an [`Answer`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Value {
    /// A number.
    Number(u64),
    /// Words.
    Text(String),
    /// Numbers by name.
    Fields(Fields),
    /// Several of a kind.
    List(Vec<Answer>),
}

impl Answer {
    /// One value.
    pub fn one(name: &'static str, value: impl Into<Value>) -> Self {
        Self(vec![(name, value.into())])
    }
}

impl Serialize for Answer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}
impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}
impl From<Fields> for Value {
    fn from(fields: Fields) -> Self {
        Self::Fields(fields)
    }
}
impl From<Vec<Answer>> for Value {
    fn from(list: Vec<Answer>) -> Self {
        Self::List(list)
    }
}
